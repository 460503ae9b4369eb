// Package layerdir keeps what a driver knows of its layers on disk, so that
// several processes can use one root and a crash at any point is mended.
//
// It owns the directory .layerfs in the home of a driver. The dot keeps it
// apart from layers, whose ids cannot start with one:
//
//	.layerfs/format              "layerfs 1"
//	.layerfs/locks               empty; its byte ranges are the locks (see Locks)
//	.layerfs/records/ID          a layer: JSON; its rename into place commits Create
//	.layerfs/removed/ID          a layer whose storage is being deleted; the
//	                             rename to here commits Remove; that of a layer
//	                             whose storage is found by its id is just deleted
//	.layerfs/children/ID/CHILD   empty; CHILD's record names ID as its parent,
//	                             or soon will. Open rebuilds them from the records
//	.layerfs/persist/ID          JSON; Gets that outlive their process
//	.layerfs/build/ID            storage being made; whoever holds the layer's
//	                             lock owns it, anybody else's is a crash's
//
// Nothing here knows what a layer's storage is.
package layerdir
