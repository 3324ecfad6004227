"""Is it better, or is it noise: paired statistics (`comparison`, `bootstrap`, `seed_noise`), the best of a sweep
(`winner`), how many items would show it (`power`), and the tables and figures that show them.
"""
