"""Settings: the LightningCLI, its options, YAML files, help and error messages."""
