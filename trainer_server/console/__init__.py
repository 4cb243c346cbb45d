"""The operator's console: web pages about runs, made from their folders by a process of its own.

It reads what servers have stored, and writes only actions of the operator (`trainer_server.storage.operations`). So it
cannot slow down or crash a server, and shows finished runs as well.
"""
