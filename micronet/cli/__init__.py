"""The command line: one small file a command, each parses, makes one call and prints."""
