"""What `secagg deploy init` writes for people, systemd and containers."""

from __future__ import annotations

README_HEAD = """\
# A trial on one machine

Certificates hold for {days} days. The keys in here were made together, without passphrases: they are for a trial. For
real, every site makes its own (`secagg keys new-site`) and compares fingerprints over the telephone.

Each block is for a terminal of its own; what is named `link` runs at whoever coordinates, the rest at each hospital.

## The link

```sh
FLWR_HOME={folder}/home FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1 \\
FLWR_SUPEREXEC_TASK_POLL_INTERVAL=0.5 PATH={bin}:$PATH exec {bin}/flower-superlink \\
  --ssl-ca-certfile {folder}/ca.crt --ssl-certfile {folder}/link/server.crt --ssl-keyfile {folder}/link/server.key \\
  --enable-supernode-auth --disable-runtime-dependency-installation --host {host} --port {port}
```
"""

README_SITE = """\
## {name}

Registered once at the link, by whoever runs it:

```sh
FLWR_HOME={folder}/home FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1 \\
  {bin}/flwr supernode register {folder}/{name}/node.pub secagg
```

The site's own process, with its key and rows:

```sh
exec {bin}/secagg site serve {folder}/{name}/site.toml --study {folder}/{name}/study.toml
```

Its connection to the link. A node that broke off is let in again when the link has missed it, a minute later; until
then its start is refused, and the loop tries again:

```sh
export FLWR_HOME={folder}/{name}/home FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1 \\
  FLWR_SUPEREXEC_TASK_POLL_INTERVAL=0.5 PATH={bin}:$PATH
until {bin}/flower-supernode --superlink {host}:{port} --root-certificates {folder}/ca.crt \\
  --auth-supernode-private-key {folder}/{name}/node.key --host 127.0.0.1 --port {node_port} \\
  --node-config "site-socket='{folder}/{name}/site.sock'"; do sleep 5; done
```
"""

NGINX = """\
# /etc/nginx/conf.d/secagg-link.conf, at whoever coordinates. A SuperLink has one port for everything, and does not ask
# who it is that submits a run or registers a node. So it listens on its own machine only; through here, hospitals reach
# what their nodes need. The certificate is from whoever makes them for the hospitals; link.crt is the link's own, for
# 127.0.0.1.
server {{
    listen 443 ssl;
    server_name {host};
    ssl_certificate /etc/secagg/proxy.crt;
    ssl_certificate_key /etc/secagg/proxy.key;
    ssl_protocols TLSv1.2 TLSv1.3;
    client_max_body_size 0;

    location /v1/fleet/ {{
        proxy_pass https://127.0.0.1:{port};
        proxy_ssl_trusted_certificate /etc/secagg/link.crt;
        proxy_ssl_verify on;
        proxy_ssl_name localhost;
    }}

    location / {{
        return 403;
    }}
}}
"""

LINK_UNIT = """\
# /etc/systemd/system/secagg-link.service, at whoever coordinates; hospitals reach it through nginx.conf
[Unit]
Description=Link that carries the messages of secagg studies
After=network-online.target
Wants=network-online.target

[Service]
User=secagg-link
Environment=FLWR_HOME=/var/lib/secagg-link FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1
Environment=FLWR_SUPEREXEC_TASK_POLL_INTERVAL=0.5 PATH=/opt/secagg/bin:/usr/bin:/bin
ExecStart=/opt/secagg/bin/flower-superlink --ssl-ca-certfile /etc/secagg/link.crt --ssl-certfile /etc/secagg/link.crt \\
  --ssl-keyfile /etc/secagg/link.key --enable-supernode-auth --disable-runtime-dependency-installation \\
  --host 127.0.0.1 --port {port}
StateDirectory=secagg-link
Restart=on-failure
NoNewPrivileges=yes
ProtectSystem=strict
ProtectHome=yes

[Install]
WantedBy=multi-user.target
"""

SITE_UNIT = """\
# /etc/systemd/system/secagg-site.service, at a hospital: has the key and the rows, and no network. It writes to
# /var/lib/secagg-site only: name state, counter and ledger there in site.toml.
[Unit]
Description=A hospital's part in a secagg study

[Service]
User=secagg-site
Group=secagg
UMask=0007
ExecStart=/opt/secagg/bin/secagg site serve /etc/secagg/site.toml --study /etc/secagg/study.toml \\
  --socket /run/secagg/site.sock
RuntimeDirectory=secagg
RuntimeDirectoryMode=0750
StateDirectory=secagg-site
StateDirectoryMode=0700
Restart=on-failure
NoNewPrivileges=yes
ProtectSystem=strict
ProtectHome=yes
PrivateNetwork=yes
RestrictAddressFamilies=AF_UNIX

[Install]
WantedBy=multi-user.target
"""

NODE_UNIT = """\
# /etc/systemd/system/secagg-node.service, at a hospital: runs what the link sends, and can read neither key nor rows
[Unit]
Description=A hospital's connection to the link of a secagg study
After=network-online.target secagg-site.service
Wants=network-online.target
# The link refuses a node that broke off until it has missed it, a minute later: try as often as that takes.
StartLimitIntervalSec=0

[Service]
User=secagg-node
Group=secagg
Environment=FLWR_HOME=/var/lib/secagg-node FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1
Environment=FLWR_SUPEREXEC_TASK_POLL_INTERVAL=0.5 PATH=/opt/secagg/bin:/usr/bin:/bin
ExecStart=/opt/secagg/bin/flower-supernode --superlink {host}:443 --root-certificates /etc/secagg/ca.crt \\
  --auth-supernode-private-key /etc/secagg/node.key --host 127.0.0.1 --port {node_port} \\
  --node-config "site-socket='/run/secagg/site.sock'"
StateDirectory=secagg-node
Restart=on-failure
RestartSec=5
NoNewPrivileges=yes
ProtectSystem=strict
ProtectHome=yes

[Install]
WantedBy=multi-user.target
"""

COMPOSE_HEAD = """\
# The same trial in containers, of an image named secagg that has the package with its extra: pip install
# 'secagg[flower]'. The node has the socket of its site and nothing else of it; the site has no network.
x-quiet: &quiet
  FLWR_TELEMETRY_ENABLED: "0"
  FLWR_DISABLE_UPDATE_CHECK: "1"
  FLWR_SUPEREXEC_TASK_POLL_INTERVAL: "0.5"
services:
  link:
    image: secagg
    restart: on-failure
    environment: *quiet
    command: >-
      flower-superlink --ssl-ca-certfile /etc/secagg/ca.crt --ssl-certfile /etc/secagg/server.crt
      --ssl-keyfile /etc/secagg/server.key --enable-supernode-auth --disable-runtime-dependency-installation
      --host 0.0.0.0 --port {port}
    ports: ["127.0.0.1:{port}:{port}"]
    volumes:
      - ./ca.crt:/etc/secagg/ca.crt:ro
      - ./link/server.crt:/etc/secagg/server.crt:ro
      - ./link/server.key:/etc/secagg/server.key:ro
"""

COMPOSE_SITE = """\
  {name}-site:
    image: secagg
    restart: on-failure
    network_mode: none
    command: secagg site serve /etc/secagg/site.toml --study /etc/secagg/study.toml --socket /run/secagg/site.sock
    volumes: ["./{name}:/etc/secagg", "{name}:/run/secagg"]
  {name}-node:
    image: secagg
    restart: on-failure
    depends_on: [link, {name}-site]
    environment: *quiet
    command: >-
      flower-supernode --superlink link:{port} --root-certificates /etc/secagg/ca.crt
      --auth-supernode-private-key /etc/secagg/node.key --node-config "site-socket='/run/secagg/site.sock'"
    volumes: ["./ca.crt:/etc/secagg/ca.crt:ro", "./{name}/node.key:/etc/secagg/node.key:ro", "{name}:/run/secagg"]
"""
