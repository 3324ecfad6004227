"""Is it better, or is it noise: paired gains and their intervals over items, mask seeds and fine-tunings (`effects`),
what may be said of them (`verdicts`), all rows of a study (`comparison`), the best of a sweep (`winner`), the bootstrap
of the analyses (`bootstrap`), and tables (`tables`, `markdown`).
"""
