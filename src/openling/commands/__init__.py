"""What each verb does beyond the library: flags, what the terminal shows, and which report is built."""
