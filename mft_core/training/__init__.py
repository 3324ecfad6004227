"""Training: the one loop (`loop`) and what it trains besides masks (`full_tuning`, `lora`, `sharded`), its optimizers
and loss, resumable state (`checkpoints`), several processes (`parallel`, `launch`).
"""
