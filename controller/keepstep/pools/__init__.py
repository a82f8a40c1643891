"""Where agents come from. A pool brings agents up and down and says what it knows of its nodes."""
