"""Other people's trainers and loggers: a module each, imported only on demand."""
