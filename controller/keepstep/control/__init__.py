"""The controller's edges: what it sees (fleet), what it has decided (book), and how that is carried out."""
