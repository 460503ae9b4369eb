// Package watch tells many clients about changes of directories through one
// inotify instance, of which a user may have few
// (fs.inotify.max_user_instances).
package watch
