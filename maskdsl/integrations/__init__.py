"""Other people's libraries, with maskdsl inside. Each is imported by name only."""
