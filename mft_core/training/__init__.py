"""Training: the one loop (`loop`) and what it trains besides masks (`full_tuning`, `lora`, `sharded`), its loss,
resumable state (`checkpoints`), several processes (`parallel`, `launch`). The optimizers are a room of their own.
"""
