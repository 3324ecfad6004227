"""Masks: where they can lie (`sites`), how scores become masks (`selection`), how scores are learned (`masking`, the
heart), mask files (`mask_file`, `packing`, `masked_sites`), what one does with them (`merge`, `algebra`,
`mask_figures`).

Where scores come from besides learning is `mft_core.selectors`.
"""
