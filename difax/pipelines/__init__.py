"""Published pipelines: from a prompt to a picture or a film."""
