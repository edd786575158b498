"""What every room needs: configs, files, progress, the machine. Nothing here imports torch."""
