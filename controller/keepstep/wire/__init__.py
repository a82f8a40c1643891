"""What controller and agents say to each other over one WebSocket."""
