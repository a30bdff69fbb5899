"""Links to a hub, sessions that survive broken links, and downloads."""
