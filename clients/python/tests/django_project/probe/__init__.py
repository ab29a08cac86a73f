"""What the views of tests write."""
