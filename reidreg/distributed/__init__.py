"""What several processes of a run share, and how they see to each other."""
