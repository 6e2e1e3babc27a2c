"""How a run is asked for: its settings, named recipes, YAML files and the command line."""
