"""What the server's console and the device's page share: access, templates, live updates, and the HTTP server.

Pages are rendered here and work without JavaScript, which only updates them and draws charts. Nothing is loaded from
other machines.
"""
