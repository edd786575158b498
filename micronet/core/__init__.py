"""What every room needs: settings, files, progress, the machine, ranks. Nothing here imports torch."""
