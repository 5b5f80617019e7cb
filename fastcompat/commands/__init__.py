"""The commands of the terminal, one file each; `app` is what the shell starts."""
