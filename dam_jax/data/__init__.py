"""Images and pools of experts; imported by name, never by the core."""
