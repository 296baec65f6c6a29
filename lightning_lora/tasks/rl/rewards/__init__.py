"""What scores completions, in processes of their own with a time limit."""
