"""Host code that GPU backends share, above one launcher interface."""
