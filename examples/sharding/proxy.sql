--
-- proxy.sql
--    The proxy: where the shards are, which tenant lives on which, and a function for
--    each one of the shards.  It has no data of tenants, and needs no extension but
--    plproxy.
--
-- Run it as a superuser, with the connect strings of the shards, without a user, as
-- everybody is known to the shards by his own name:
--
--     psql "$PROXY" -v ON_ERROR_STOP=1 -f proxy.sql \
--         -v shard0='host=shard0 dbname=shop' -v shard1='host=shard1 dbname=shop' \
--         -v shard2='host=shard2 dbname=shop'
--
-- A hash of the tenant alone (RUN ON hashtext(tenant)) would need no table, but then
-- no tenant could ever be moved by itself, and one more shard would move almost all.
-- So each tenant has a row in a directory, which is read by its primary key in each
-- call.  A tenant without a row is unknown.
--
-- The directory only says where to ask.  If it is wrong, the shard refuses the
-- request, and nothing is done twice.
--

-- Roles belong to the whole server
DO $$
BEGIN
    IF to_regrole('shop_app') IS NULL THEN
        CREATE ROLE shop_app LOGIN;
    END IF;
END
$$;

CREATE EXTENSION plproxy;

CREATE SCHEMA routing;
CREATE SCHEMA api;
GRANT USAGE ON SCHEMA routing, api TO shop_app;

--
-- The shards, from 0 on without a gap.  Another one is added by ALTER SERVER, which
-- running sessions see, and gets its share of the tenants that are new.
--

CREATE SERVER shards FOREIGN DATA WRAPPER plproxy OPTIONS (
    modular_mapping '1',            -- the number of shards is no power of two
    connection_lifetime '1800',
    p0 :'shard0',
    p1 :'shard1',
    p2 :'shard2'
);
GRANT USAGE ON FOREIGN SERVER shards TO shop_app;

-- Where the shards ask for a password, give each role a mapping with its own:
-- CREATE USER MAPPING FOR shop_app SERVER shards OPTIONS (password '...').
CREATE USER MAPPING FOR PUBLIC SERVER shards;

CREATE VIEW routing.shards AS
    SELECT substr(option_name, 2)::int AS shard, option_value AS conninfo
    FROM pg_foreign_server, pg_options_to_table(srvoptions)
    WHERE srvname = 'shards' AND option_name ~ '^p[0-9]+$';
COMMENT ON VIEW routing.shards IS
'the shards, as they are in the options of the server';

--
-- The directory
--

CREATE TABLE routing.directory (
    tenant text COLLATE "C" PRIMARY KEY,
    shard int NOT NULL,
    moved_by uuid
);
COMMENT ON TABLE routing.directory IS
'which tenant is asked for where; the global tenant, if it is to have a place, is ''''';
COMMENT ON COLUMN routing.directory.moved_by IS
'the move that has brought it there, null if it was created there';

CREATE TABLE routing.moves (
    tenant text COLLATE "C" PRIMARY KEY REFERENCES routing.directory,
    id uuid NOT NULL DEFAULT gen_random_uuid(),
    previous uuid,
    source int NOT NULL,
    destination int NOT NULL CHECK (destination <> source)
);
COMMENT ON TABLE routing.moves IS
'tenants that are being moved. A row that stays is of a move that was killed: repeat it, with move-tenant';
COMMENT ON COLUMN routing.moves.id IS
'what the shards know the move by; it never comes again';
COMMENT ON COLUMN routing.moves.previous IS
'the move that has brought the tenant to the source, if there was one';

-- The number of the shard to ask.
CREATE FUNCTION routing.shard_of(tenant text) RETURNS int
LANGUAGE plpgsql STABLE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    found_shard int := (SELECT shard FROM routing.directory AS d WHERE d.tenant = coalesce(shard_of.tenant, ''));
BEGIN
    IF found_shard IS NULL THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value', MESSAGE = 'tenant is unknown';
    END IF;
    RETURN found_shard;
END
$$;

CREATE FUNCTION routing.add_to_shard(tenant text) RETURNS void
LANGUAGE plproxy
AS $$
    CLUSTER 'shards';
    RUN ON routing.shard_of(tenant);
    TARGET tenancy.add_tenant;
$$;

-- Gives a new tenant a place, by a hash; nothing depends on where.  It is safe to
-- repeat: its place is committed before the shard is told, and does not change while
-- it is.
CREATE PROCEDURE routing.create_tenant(tenant text)
LANGUAGE plpgsql
AS $$
BEGIN
    INSERT INTO routing.directory (tenant, shard)
    SELECT coalesce(tenant, ''), (hashtext(coalesce(tenant, '')) & 2147483647) % count(*)
    FROM routing.shards
    ON CONFLICT DO NOTHING;
    COMMIT;

    PERFORM FROM routing.directory AS d WHERE d.tenant = coalesce(create_tenant.tenant, '') FOR SHARE;
    PERFORM routing.add_to_shard(tenant);
END
$$;

REVOKE ALL ON ALL ROUTINES IN SCHEMA routing FROM PUBLIC;
GRANT EXECUTE ON FUNCTION routing.shard_of TO shop_app;

--
-- The functions of the shards.  PL/Proxy calls the one of the same name and arguments,
-- which is committed there before its answer comes back.
--

CREATE FUNCTION api.pay(
    tenant text, key text, request jsonb,
    OUT outcome text, OUT status_code int, OUT response json, OUT retry_after int
)
LANGUAGE plproxy
AS $$
    CLUSTER 'shards';
    RUN ON routing.shard_of(tenant);
$$;

CREATE FUNCTION api.refund(
    tenant text, key text, request jsonb,
    OUT outcome text, OUT status_code int, OUT response json
)
LANGUAGE plproxy
AS $$
    CLUSTER 'shards';
    RUN ON routing.shard_of(tenant);
$$;

CREATE FUNCTION api.status(
    tenant text, action text, key text,
    OUT outcome text, OUT status_code int, OUT response json, OUT retry_after int
)
LANGUAGE plproxy
AS $$
    CLUSTER 'shards';
    RUN ON routing.shard_of(tenant);
$$;

CREATE FUNCTION api.begin_charge(
    tenant text, key text, request jsonb, claim uuid,
    OUT outcome text, OUT status_code int, OUT response json, OUT retry_after int,
    OUT attempt int, OUT recovery_point text, OUT recovery_state jsonb
)
LANGUAGE plproxy
AS $$
    CLUSTER 'shards';
    RUN ON routing.shard_of(tenant);
$$;

CREATE FUNCTION api.save_charge(
    tenant text, key text, claim uuid, recovery_point text, recovery_state jsonb
) RETURNS timestamptz
LANGUAGE plproxy
AS $$
    CLUSTER 'shards';
    RUN ON routing.shard_of(tenant);
$$;

CREATE FUNCTION api.finish_charge(
    tenant text, key text, claim uuid, charge text, amount numeric
) RETURNS text
LANGUAGE plproxy
AS $$
    CLUSTER 'shards';
    RUN ON routing.shard_of(tenant);
$$;

CREATE FUNCTION api.deposit(tenant text, messages jsonb) RETURNS int
LANGUAGE plproxy
AS $$
    CLUSTER 'shards';
    RUN ON routing.shard_of(tenant);
$$;

REVOKE ALL ON ALL FUNCTIONS IN SCHEMA api FROM PUBLIC;
GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA api TO shop_app;
