"""What the commands on adapter files do: merge, resize, check and inspect."""
