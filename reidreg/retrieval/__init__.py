"""From features to figures: exact distances, the position of every match, and what follows."""
