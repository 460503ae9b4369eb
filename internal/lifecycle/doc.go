// Package lifecycle is the part of a driver that is the same for every
// backend: ids, records, locks, counts, freezing, commit points, recovery and
// errors. A backend is a [Mechanism], and embeds the [Driver] made from it.
//
// # Order of locks
//
// The lock of a layer (see layerdir.Locks), several at once only in one call;
// then Driver.mu, which is never held across a system call; then whatever the
// mechanism has. Nothing is held while a caller's callback runs, except the
// layer's own lock in Create and Apply.
//
// # Commit points
//
// Create: the child marker (freezes the parent), the storage, the record. A
// crash before the record leaves storage without a record, which New deletes.
// Remove: the record moves to "removed", the storage goes, the record is
// forgotten. A crash in between is finished by New. Where the storage can be
// deleted without it (see [IDDeleter]) the record just goes, and a crash leaves
// what one in Create does.
// Apply: either the mechanism changes the layer in one step, or the record is
// marked incomplete before the first change and cleared after the last.
package lifecycle
