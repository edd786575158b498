"""The artifact: one self-describing file that every command reads and writes, and files of other kinds."""
