"""Settings: options, YAML files, help and error messages, and the objects that they describe."""
