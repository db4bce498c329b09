"""A newcomer's first commands: `init` writes a configuration, `doctor` looks at machine and run."""
