"""Pictures that a person judges on a page of this machine, and the file of preferences that comes of it."""
