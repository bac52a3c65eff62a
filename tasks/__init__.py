"""What one retryable step does; the packages below know how."""
