"""From YAML and --set to settings: `study` and `profile` are read (`by_name`) and make the setups of all variants
(`yaml_to_setups`), which are `setup`; the names in them are made contents by `resolve`.
"""
