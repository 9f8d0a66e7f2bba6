"""Settings of a server: what there is to set, and reading it from flags, environment and YAML."""
