"""The public face over HTTP: REST, an event stream, and the agents' socket."""
