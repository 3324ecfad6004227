"""What a study is going to do, before it does anything: variants, comparison, analyses, memory, disk, last checks."""
