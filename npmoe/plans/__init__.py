"""Plans of other systems: block views and their dialects, layouts both ways, and what is wrong."""
