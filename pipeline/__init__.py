"""What the user touches: commands, configuration, plan, report. Imports nothing heavy at start-up."""
