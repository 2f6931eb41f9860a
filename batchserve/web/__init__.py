"""The web page: HTML for people, over the functions that the HTTP API is made of. It changes nothing by itself."""
