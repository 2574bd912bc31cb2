"""Complete small training scripts, run as scripts and imported by nobody; a package only so that they ship."""
