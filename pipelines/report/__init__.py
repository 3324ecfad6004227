"""The report of a study as files that people open: Markdown, one self-contained HTML page, CSV and Parquet.

`page` writes a study's, `composite` the index of a study that is made of studies. Both are made of *sections* in
Markdown (`sections`), which `render` turns into HTML. Nothing is computed here but words: every number comes from
`pipelines.report.report`.
"""
