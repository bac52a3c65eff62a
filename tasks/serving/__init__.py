"""What a ranker imports."""
