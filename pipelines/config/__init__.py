"""From YAML and --set to settings: profiles, studies, one variant's setup, and the names in it made contents."""
