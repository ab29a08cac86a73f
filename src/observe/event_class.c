/*-------------------------------------------------------------------------
 *
 * event_class.c
 *	  What can become of a request, by name.
 *
 *-------------------------------------------------------------------------
 */
#include "base.h"

#include "observe/event_class.h"

static const char *const class_names[EVENT_CLASSES] = {
	[EVENT_STARTED] = "started",
	[EVENT_REPLAYED] = "replayed",
	[EVENT_IN_FLIGHT] = "in_flight",
	[EVENT_MISMATCHED] = "mismatched",
	[EVENT_EXPIRED] = "expired",
	[EVENT_STALLED] = "stalled",
	[EVENT_TAKEN_OVER] = "taken_over",
	[EVENT_COMPLETED] = "completed",
	[EVENT_ERRORED] = "errored",
	[EVENT_RELEASED] = "released",
	[EVENT_SWEPT] = "swept",
};

/*
 * The name of a class of events, as settings, columns and log lines have it.
 */
const char *
EventClassName(EventClass class)
{
	return class_names[class];
}
