# Makes the host's directories the agent's: run as root, with an empty root file system but these
# directories, before each start of an agent. It takes nothing that is somebody else's, and leaves what is
# in them as it is: the state of the release before.
set -eu

refuse() {
    echo "error: $1" >&2
    echo "hint: $2" >&2
    exit 1
}

# Memory, and enough of it: what is beyond the tmpfs would be refused to trainers one by one, later.
kind=$(stat -f -c %T "$RAM_DIR")
if [ "$kind" != tmpfs ]; then
    refuse "ram.hostPath: $RAM_DIR is $kind on this node, and the RAM tier lies on tmpfs" \
        "give a directory below /dev/shm, or below another tmpfs of the node"
fi
set -- $(stat -f -c '%b %S' "$RAM_DIR")
total=$(($1 * $2)) # 0: without limit
if [ "$total" -gt 0 ] && [ "$total" -lt "$RAM_BYTES" ]; then
    refuse "ram.bytes: the tmpfs at $RAM_DIR has $total bytes on this node, and $RAM_BYTES are asked for" \
        "mount -o remount,size=... on the node, or give less"
fi

for dir in "$RAM_DIR" "$DISK_DIR" "$SOCKET_DIR"; do
    mark="$dir/.release"
    owner=$(stat -c %u "$dir")
    if [ "$TAKE_OVER" = true ] && [ -e "$mark" ]; then
        rm -f "$mark"
    elif [ ! -e "$mark" ] && [ "$owner" != "$AGENT_UID" ] && [ -n "$(ls -A "$dir")" ]; then
        refuse "$dir belongs to user $owner of this node and is not empty: it has another use" \
            "give another directory, or make it the agent's: chown -R $AGENT_UID:$AGENT_UID $dir"
    fi
    # noclobber: of two releases that come at once one makes the mark, the other reads it.
    (set -C && echo "$RELEASE" >"$mark") 2>/dev/null || true
    other=$(cat "$mark")
    if [ "$other" != "$RELEASE" ]; then
        refuse "$dir is in use by the release $other on this node, and this is $RELEASE" \
            "one release a node; where $other is gone for good, prepare.takeOver takes its state over"
    fi
    # All of it only where agent.uid has changed: a disk may hold millions of files.
    if [ "$owner" != "$AGENT_UID" ]; then
        chown -hR "$AGENT_UID:$AGENT_UID" "$dir"
    fi
done

# Trainers get descriptors from the agent and look into neither; they only have to find the socket.
chmod 0700 "$RAM_DIR" "$DISK_DIR"
chmod 0755 "$SOCKET_DIR"
