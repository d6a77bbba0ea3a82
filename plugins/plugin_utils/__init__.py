"""What several plugins of the controller share; nothing here is sent to a worker."""
