"""`surgvqa report`: scores, samples and answers as one HTML page that needs no server and no network."""
