// Package layerdir keeps what a driver knows of its layers on disk, so that
// several processes can use one root and a crash at any point is mended.
//
// It owns the directory .layerfs in the home of a driver. The dot keeps it
// apart from layers, whose ids cannot start with one:
//
//	.layerfs/format              "layerfs 1"
//	.layerfs/locks               empty; its byte ranges are the locks (see Locks)
//	.layerfs/records/ID          a layer: JSON and a newline. A new one is being
//	                             written as long as it has mode 0700 and no
//	                             newline, or gets its name by a rename; that
//	                             it is whole commits Create
//	.layerfs/removed/ID          a layer whose storage is being deleted; the
//	                             rename to here commits Remove; that of a layer
//	                             whose storage is found by its id is just deleted
//	.layerfs/children/ID         the layers made on ID, one a line: their records
//	                             name it as their parent, or soon will, or they
//	                             are gone. Open adds what the records tell
//	.layerfs/persist/ID          JSON; Gets that outlive their process
//	.layerfs/build/ID            storage being made; whoever holds the layer's
//	                             lock owns it, anybody else's is a crash's
//
// Nothing here knows what a layer's storage is.
package layerdir
