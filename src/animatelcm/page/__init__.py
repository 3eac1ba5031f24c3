"""One static HTML page of a folder of videos and figures: what ``animatelcm report`` writes."""
