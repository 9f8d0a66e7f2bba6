"""What comes from outside: checked, recognised, and made fit to be shown."""
